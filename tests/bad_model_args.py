"""Input that must be refused, with the text that the refusal must hold: lmms-eval's --model_args, written by hand."""

from __future__ import annotations

# of one argument, beside those of the table below
RATES = ["nan", "inf", "-inf", "1", "1.0", "-0.1", "1e400", "abc", "2/0", "3/2", "٢/٣", "50%", "1e-99999/3", "true", "[0.5]", "0.5.5"]
NO_METHODS = ["", "3", "nan", "true", "vlmprunr", "os:system", "builtins:eval", "builtins:exec", "os.path:join", "json:JSONDecoder"]
NO_PATHS = ["../../x:Y", ".:Y", "..x:Y", "os:", ":Y", ":", "no_such_package:Y", "os:nothing", "/etc/passwd:Y", "a b:C", "os;x:Y"]
NO_PATHS += ["os:system:x"]

LONG = "x" * 300
_NEEDED = "pretrained=minivlm,method=vlmpruner,pruning_rate=0.5"
MODEL_ARGS: list[tuple[str, str]] = [
    ("", "pretrained: missing"),
    (" ", "pretrained: missing"),
    (",,,", "pretrained: missing"),
    ("pretrained", "model_args: got 'pretrained', expected name=value pairs"),
    ("pretrained=minivlm,method", "expected name=value pairs"),
    ("=", "'': unknown argument"),
    ("=minivlm", "'': unknown argument"),
    ("pretrained=", "pretrained: got ''"),
    ("pretrained= ", "pretrained: got ''"),
    ("pretrained=7", "pretrained: got 7 (int)"),
    ("pretrained=0.5", "pretrained: got 0.5 (float)"),
    ("pretrained=true", "pretrained: got True (bool)"),
    ("pretrained=nan", "pretrained: got nan (float)"),
    ("pretrained=½", "expected name=value pairs"),
    ("pretrained=" + "9" * 5000, "model_args: got"),
    ("pretrained=a\x00b", "pretrained: got 'a\\x00b'"),
    ("pretrained=a\x1b[31mb", "pretrained: got 'a\\x1b[31mb'"),
    ("pretrained=/nowhere/at/all", "pretrained: there is nothing at /nowhere/at/all"),
    ("pretrained=../../nowhere", "pretrained: there is nothing at ../../nowhere"),
    ("pretrained=~nobody-here/x", "pretrained: there is nothing at ~nobody-here/x"),
    ("pretrained=/dev/null", "holds no config.json"),
    ("pretrained=/dev/zero", "holds no config.json"),
    ("pretrained=/etc/passwd", "holds no config.json"),
    ("pretrained=/" + LONG, "pretrained: there is nothing at"),
    ("pretrained=" + "a/" * 600, "pretrained: there is nothing at"),
    ("pretrained=https://example.com/x", "pretrained: there is nothing at"),
    ("pretrained=file:///etc", "pretrained: there is nothing at"),
    ("pretrained=owner/", "pretrained: the configuration of owner/ can't be read"),
    ("pretrained=a b/c d", "pretrained: the configuration of a b/c d can't be read"),
    ("pretrained=minivlm,pretrained=minivlm", "pretrained: is given 2 times in model_args"),
    (_NEEDED + ",method=fastv", "method: is given 2 times in model_args"),
    (_NEEDED + ",pruning_rate=0.5", "pruning_rate: is given 2 times in model_args"),
    *[
        (f"{_NEEDED},{name}=1", f"{name}: unknown argument")
        for name in ("trust_remote_code", "token", "load_in_4bit", "x", "__init__", "ä")
    ],
    (_NEEDED + ",treshold=1", "treshold: unknown argument; did you mean 'threshold'"),
    (_NEEDED + ",Pretrained=x", "Pretrained: unknown argument; did you mean 'pretrained'"),
    (_NEEDED + ",batchsize=2", "batchsize: unknown argument; did you mean 'batch_size'"),
    (_NEEDED + ",a\x1bb=2", "'a\\x1bb': unknown argument"),
    (_NEEDED + "," + LONG + "=2", "unknown argument"),
    *[(f"pretrained=minivlm,method=fastv,pruning_rate={rate}", "pruning_rate: got ") for rate in RATES],
    ("pretrained=minivlm,method=fastv,pruning_rate=", "pruning_rate: got ''"),
    ("pretrained=minivlm,method=fastv,pruning_rate=" + "9" * 300, "pruning_rate: got a whole number of 997 bits"),
    ("pretrained=minivlm,method=fastv,pruning_rate=1/" + "3" * 300, "pruning_rate: got "),
    ("pretrained=minivlm,method=fastv", "pruning_rate: missing, but method=fastv needs it"),
    ("pretrained=minivlm,pruning_rate=0.5", "with method=none, which prunes nothing"),
    *[(f"pretrained=minivlm,pruning_rate=0.5,method={name}", "method: ") for name in NO_METHODS],
    *[(f"pretrained=minivlm,pruning_rate=0.5,method={path}", "can't be imported") for path in NO_PATHS],
    ("pretrained=minivlm,pruning_rate=0.5,method=vlm_pruner_eval.pruners.base:Pruner", "expected a subclass of vlm_pruner_eval.Pruner"),
    ("pretrained=minivlm,pruning_rate=0.5,method=" + LONG, "method: got 'xxx"),
    *[(f"{_NEEDED},dtype={value}", "dtype: got ") for value in ("", "fp16", "int8", "16", "nan", "float32 x")],
    *[(f"{_NEEDED},attn_implementation={value}", "attn_implementation: got ") for value in ("", "spda", "flash", "2")],
    *[(f"{_NEEDED},protocol={value}", "protocol: got ") for value in ("", "papr", "../hf", "1")],
    *[(f"{_NEEDED},device={value}", "device: got ") for value in ("", "gpu", "meta", "0", "cuda:x", "cpu;x", "cuda:9999", "cuda:٣")],
    *[(f"{_NEEDED},revision={value}", "revision: got ") for value in ("", "1234567", "../../x", "a..b", "a b", "-x", LONG)],
    *[
        (f"{_NEEDED},batch_size={value}", "batch_size: got ")
        for value in ("0", "-1", "auto", "1.5", "nan", "true", "", "9" * 30, "2147483648")
    ],
    *[(f"{_NEEDED},max_frames_num={value}", "max_frames_num: got ") for value in ("0", "-1", "all", "1.5", "true", "")],
    *[(f"{_NEEDED},allow_bin={value}", "allow_bin: got ") for value in ("1", "yes", "", "nan")],
    (_NEEDED + ",min_pixels=9,max_pixels=8", "min_pixels: got 9, expected at most max_pixels"),
    (_NEEDED + ",max_frames_num=8", "max_frames_num: got 8, expected none for vlmpruner_llava"),
    (_NEEDED + ",system_prompt=", "system_prompt: got ''"),
    (_NEEDED + ",system_prompt=7", "system_prompt: got 7 (int)"),
    (_NEEDED + ",protocol=paper,system_prompt=Be brief", "protocol=paper has its own"),
    *[(f"{_NEEDED},pivots={value}", "pivots: got ") for value in ("0", "-1", "1.5", "abc", "nan", "true", "", "9" * 40)],
    *[(f"{_NEEDED},threshold={value}", "threshold: got ") for value in ("nan", "inf", "abc", "", "true", "9" * 400)],
    *[(f"{_NEEDED},layer={value}", "layer: got ") for value in ("-1", "1.5", "abc", "", "9" * 40)],
    *[(f"{_NEEDED},scope={value}", "scope: got ") for value in ("", "per_video", "1")],
    (_NEEDED + ",official_quirks=1", "official_quirks: got 1 (int)"),
    (_NEEDED + ",merge={}", "merge: got '{}' (str)"),
]

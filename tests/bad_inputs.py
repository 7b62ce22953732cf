"""Input that must be refused, with the text that the refusal must hold: sweep files, written by hand."""

from __future__ import annotations

from typing import Any

import yaml

GOOD: dict[str, Any] = {
    "name": "good",
    "model": {"id": "vlmpruner_llava", "pretrained": "minivlm", "visual_tokens": 576, "layers": 32},
    "tasks": ["digitscenes_exist", "digitscenes_read"],
    "pruning_rates": ["2/3", 0.889],
    "methods": ["vlmpruner", {"name": "random", "seeds": [0, 1]}, {"name": "fastv", "layer": 3, "label": "FastV at 3"}],
}
TEXT = yaml.safe_dump(GOOD, sort_keys=False)
LONG = "x" * 300


def _with(**changes: object) -> str:
    """The good file with some keys replaced, or removed where the new value is `...`."""
    raw = {key: value for key, value in (GOOD | changes).items() if value is not ...}
    return yaml.safe_dump(raw, sort_keys=False, allow_unicode=True)


def _model(**changes: object) -> str:
    return _with(model={key: value for key, value in (GOOD["model"] | changes).items() if value is not ...})


def _methods(*entries: object) -> str:
    return _with(methods=list(entries))


def _rates(*rates: object) -> str:
    return _with(pruning_rates=list(rates))


def _bomb(depth: int, width: int = 9) -> str:
    lines = [f"a0: &a0 [{', '.join('x' * width)}]"]
    return "\n".join([*lines, *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, depth))])


def _merge_bomb(depth: int, width: int = 9) -> str:
    lines = [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * width)}]}}" for i in range(1, depth)]
    return "\n".join(["a0: &a0 {x: 1, y: 2}", *lines])


# ---- not a sweep file at all
_NOT_A_FILE = [
    ("", "got an empty file"),
    (" \n\t\n", "is not valid YAML"),
    ("# only a comment\n", "got an empty file"),
    ("---\n...\n", "got an empty file"),
    ("null", "got an empty file"),
    ("~", "got an empty file"),
    ("3", "got int 3, expected a mapping"),
    ("true", "got bool True, expected a mapping"),
    ("2024-01-01", "got date"),
    ("just words", "got str 'just words'"),
    ("- a\n- b", "got list ['a', 'b']"),
    ("[]", "got list []"),
    ("{}", "name: is missing"),
    ("{a: 1", "is not valid YAML"),
    ("a: [1, 2", "is not valid YAML"),
    ("a: b: c", "is not valid YAML"),
    ("a: 'open", "is not valid YAML"),
    ("\ta: 1", "is not valid YAML"),
    ("%YAML 9.9\n---\na: 1", "is not valid YAML"),
    ("a: 1\n---\nb: 2", "is not valid YAML"),
    ("a: *nowhere", "is not valid YAML"),
    ("a: @x", "is not valid YAML"),
    ("a: `x`", "is not valid YAML"),
    ("!!python/object/apply:os.system ['true']", "is not valid YAML"),
    ("a: !!python/name:os.system", "is not valid YAML"),
    ("a: !!python/object/new:subprocess.Popen [[touch, pwned]]", "is not valid YAML"),
    ("a: !own {b: 1}", "is not valid YAML"),
    ("a: !!bool perhaps", "is not valid YAML"),
    ("a: !!int ''", "is not valid YAML"),
    ("a: !!int twelve", "is not valid YAML"),
    ("a: !!float x", "is not valid YAML"),
    ("a: !!timestamp yesterday", "is not valid YAML"),
    ("a: 2024-13-45", "is not valid YAML"),
    ("a: !!binary '*'", "a: is an unknown key"),
    ("? [a, b]\n: 1", "is not valid YAML"),
    ("? {a: 1}\n: 1", "is not valid YAML"),
    ("[" * 3000, "is not valid YAML"),
    ("{a: " * 3000, "is not valid YAML"),
    ("- " * 3000, "is not valid YAML"),
    ("a: \x00", "is not valid YAML"),
    ("a: \x1b[31mred", "is not valid YAML"),
    ("a: " + "1" * 5000, "is not valid YAML"),
]
# ---- values that nothing may unfold, show or keep
_HOSTILE = [
    (_bomb(9) + "\n" + TEXT, "a3: stands for more than 5000 values"),
    (_bomb(40) + "\n" + TEXT, "a3: stands for more than 5000 values"),
    (_merge_bomb(12) + "\n" + TEXT, "stands for more than 5000 values"),
    (TEXT + "limit: [" + "1, " * 6000 + "1]", "limit: stands for more than 5000 values"),
    ("a: &a [*a]\n" + TEXT, "a[0]: holds an anchor that contains itself"),
    (TEXT.replace("layer: 3", "layer: &b {c: *b}"), "methods[2].layer.c: holds an anchor that contains itself"),
    (TEXT + "limit: 0x" + "f" * 4000, "limit: got a whole number of 16000 bits"),
    (TEXT + "seed: 0b1" + "0" * 64, "seed: got a whole number of 65 bits"),
    (TEXT + "limit: -" + "9" * 30, "limit: got a whole number of 100 bits"),
    (_model(pretrained="x" * 5000), "model.pretrained: the text has 5000 characters"),
    (TEXT + "? " + "y" * 5000 + "\n: 1", "has 5000 characters, expected at most 4000"),
    (TEXT + "1: 2", "the file: has the key 1 (int), expected text"),
    (TEXT + "null: 2", "the file: has the key None (NoneType), expected text"),
    (TEXT + "yes: 2", "the file: has the key True (bool), expected text"),
    (TEXT + "2024-01-01: 2", "the file: has the key datetime.date(2024, 1, 1) (date), expected text"),
    (_methods({"name": "fastv", 3: 4}), "methods[0]: has the key 3 (int)"),
    (TEXT.replace("pretrained: minivlm", 'pretrained: "mini\\evlm"'), "model.pretrained: the text holds control characters"),
    (TEXT.replace("pretrained: minivlm", 'pretrained: "mini\\0vlm"'), "model.pretrained: the text holds control characters"),
    (TEXT.replace("FastV at 3", '"a\\u202eb"'), "methods[2].label: the text holds control characters"),
    (TEXT + '"a\\eb": 1', "the file: the key 'a\\x1bb' holds control characters"),
    (_model(revision="hf_" + "a" * 34), "model.revision: the text looks like an access token"),
    (_model(system_prompt="key sk-" + "a1" * 20), "model.system_prompt: the text looks like an access token"),
]
# ---- keys
_KEYS = [
    (TEXT + "limit: 3\nlimit: 4", "limit: is given twice"),
    (TEXT.replace("  id:", "  id: other\n  id:"), "model.id: is given twice"),
    (TEXT.replace("  layer: 3", "  layer: 3\n  layer: 4"), "methods[2].layer: is given twice"),
    (TEXT + '"limit": 3\nlimit: 3', "limit: is given twice"),
    *[(_with(**{key: 1}), f"{key}: is an unknown key") for key in ("task", "Name", "trust_remote_code", "__class__", "команда", "run-id")],
    (_with(**{"tasks ": ["gqa"]}), "'tasks ': is an unknown key; did you mean 'tasks'"),
    (_with(**{"": 1}), "'': is an unknown key"),
    (_model(batchsize=2), "model.batchsize: is an unknown key; did you mean 'batch_size'"),
    (_model(trust_remote_code=True), "model.trust_remote_code: is an unknown key"),
    (_model(token="abc"), "model.token: is an unknown key"),
    *[(_with(**{key: ...}), f"{key}: is missing") for key in ("name", "model", "tasks", "methods")],
    (_with(pruning_rates=...), "got neither pruning_rates nor keep_tokens"),
    (_with(keep_tokens=[64]), "got both pruning_rates and keep_tokens"),
    (_model(id=...), "model.id: is missing"),
    (_model(pretrained=...), "model.pretrained: is missing"),
]
# ---- name, output, tasks, numbers
_PLACES = ("../up", "..", ".", "/etc", "a/b", "a\\b", "", " ", "a b", "-x", "_x", "ä", "a\nb", "名", "con:", "$HOME", "a" * 101, "%2e%2e")
_OUTPUTS = ("/tmp/x", "../x", "a/../../x", "..", "~/x", "~root", "", " ", "C:\\x", "a\\..\\x", "//x", "a/" + LONG)
_TOP = [
    *[(_with(name=name), "name: got ") for name in _PLACES],
    *[(_with(name=value), f"name: got {value!r}") for value in (3, None, True, 1.5, ["a"], {"a": 1})],
    *[(_with(output=folder), "output: got ") for folder in _OUTPUTS],
    *[(_with(output=value), f"output: got {value!r}") for value in (3, True, ["a"])],
    *[(_with(tasks=value), "tasks: got ") for value in ([], "gqa", 3, None, {"gqa": 1}, ["gqa", "gqa"])],
    *[(_with(tasks=["gqa", value]), "tasks[1]: got ") for value in (3, None, "", ["a"], {"task": "gqa"}, True)],
    *[(_with(limit=value), "limit: got ") for value in (0, -1, 0.5, "3", True, [3], float("nan"), float("inf"), 2**31, 2**62)],
    *[(_with(seed=value), "seed: got ") for value in (-1, 2**32, "0", None, 1.0, False)],
    *[(_with(gallery=value), "gallery: got ") for value in (-1, 2**40, "all", None)],
    *[(_with(share_prefix=value), "share_prefix: got ") for value in (1, "yes", None, "true")],
    (TEXT + "limit: 1e400", "limit: got '1e400' (str)"),
    (TEXT + "limit: .inf", "limit: got inf"),
]
# ---- rates and counts
_BAD_RATES = (1, 1.0, 2, -0.1, -1, 1.0000001, float("nan"), float("inf"), -float("inf"), 1e308, 2**62, True, None, [], {}, [0.5], "", " ")
_BAD_RATE_TEXTS = (
    "1",
    "1.0",
    "-0.1",
    "2/0",
    "0/0",
    "3/2",
    "abc",
    "nan",
    "inf",
    "50%",
    "1/2/3",
    "0x1",
    "٢/٣",
    "½",
    "1_0/30",
    "1e-999999999",
)
_RATES = [
    *[(_rates(0.5, rate), "pruning_rates[1]: got ") for rate in (*_BAD_RATES, *_BAD_RATE_TEXTS, "9" * 300, "1/" + "3" * 300)],
    (_rates("1/2", 0.5), "pruning_rates: got 0.5 2 times"),
    (_rates("1/2", "2/4"), "pruning_rates: got 0.5 2 times"),
    *[(_with(pruning_rates=value), "pruning_rates: got ") for value in ([], 0.5, "2/3", {"a": 0.5})],
    *[
        (_with(pruning_rates=..., keep_tokens=[value]), "keep_tokens[0]: got ")
        for value in (0, -1, 1.5, "64", None, True, 2**31, float("nan"))
    ],
    (_with(pruning_rates=..., keep_tokens=[]), "keep_tokens: got []"),
    (_with(pruning_rates=..., keep_tokens=[64, 64]), "keep_tokens: got 64 2 times"),
    (_with(pruning_rates=..., keep_tokens=[577]), "keep_tokens: got 577, expected at most model.visual_tokens = 576"),
]
# ---- the model
_MODELS = [
    *[(_with(model=value), "model: got ") for value in ("minivlm", 3, None, ["a"], True)],
    *[(_model(id=value), "model.id: got ") for value in ("vlmpruner_lava", "llava_hf", "os.system", "", 3, None, "vlmpruner_llava ")],
    *[(_model(pretrained=value), "model.pretrained: got ") for value in ("", " ", 3, None, ["a"], "x\ny", "p" * 1001)],
    *[(_model(revision=value), "model.revision: got ") for value in (1234567, "../main", "a..b", "", "main; rm -rf x", "a b", "-x", LONG)],
    *[(_model(dtype=value), "model.dtype: got ") for value in ("fp16", "int8", 16, None, "", "FLOAT32")],
    *[(_model(device=value), "model.device: got ") for value in ("gpu", "meta", "", 0, "cuda:x", "cuda:-1", "cpu;x", "cuda:٣")],
    *[(_model(batch_size=value), "model.batch_size: got ") for value in (0, -1, "2", 1.5, None, True, "auto", 2**31)],
    *[(_model(protocol=value), "model.protocol: got ") for value in ("papr", "", 3, None)],
    *[(_model(attn_implementation=value), "model.attn_implementation: got ") for value in ("spda", "", 3, None)],
    *[(_model(max_pixels=value), "model.max_pixels: got ") for value in (0, -5, "9", 1.5, 2**40)],
    *[(_model(visual_tokens=value), "model.visual_tokens: got ") for value in (0, -5, "576", 1.5, 2**40)],
    (_model(min_pixels=9, max_pixels=4), "model.min_pixels: got 9, expected at most"),
    *[(_model(allow_bin=value), "model.allow_bin: got ") for value in (1, "yes", "true")],
    *[(_model(system_prompt=value), "model.system_prompt: got ") for value in ("", 3)],
]
# ---- methods
_METHODS = [
    *[(_with(methods=value), "methods: got ") for value in ([], "vlmpruner", 3, None, {"name": "fastv"})],
    *[(_methods(value), "methods[0]: got ") for value in (3, None, True, ["fastv"], 0.5)],
    (_methods({"label": "x"}), "methods[0].name: is missing"),
    (_methods({}), "methods[0].name: is missing"),
    *[(_methods({"name": value}), "methods[0].name: got ") for value in (3, None, True, ["fastv"], "")],
    (_methods("vlmprunr"), "methods[0]: method: got 'vlmprunr', which is unknown; did you mean 'vlmpruner'"),
    *[(_methods(name), "methods[0]: method: ") for name in ("os:system", "builtins:eval", "os.path:join", "builtins:object", "json:loads")],
    *[
        (_methods(name), "can't be imported")
        for name in ("../../x:Y", ".x:Y", "/etc/passwd:Y", "os:", ":Y", "no_such:Y", "os:nothing", "a b:C")
    ],
    (_methods("vlm_pruner_eval.pruners.base:Pruner"), "methods[0]: method: "),
    (_methods("x" * 3000), "methods[0]: method: got 'xxx"),
    (_methods("none"), "methods[0]: got none, but the unpruned run is always in the grid"),
    (_methods("fastv", "fastv"), "methods: 'fastv-2of3' and 'fastv-2of3' are the same run"),
    (_methods("fastv", {"name": "fastv", "layer": 2}), "are the same run"),
    (_methods({"name": "fastv", "label": "a"}, {"name": "fastv", "layer": 3, "label": "a"}), "two different runs are both named"),
    (_methods({"name": "fastv", "label": "方法"}, {"name": "dart", "label": "手法"}), "two different runs are both named"),
    (_methods({"name": "vlmpruner", "pivot": 3}), "methods[0]: vlmpruner: unknown parameter 'pivot'; did you mean 'pivots'"),
    (_methods({"name": "vlmpruner", "pivots": 0}), "methods[0]: vlmpruner: pivots: got 0"),
    (_methods({"name": "vlmpruner", "pivots": 2.0}), "methods[0]: vlmpruner: pivots: got 2.0 (float)"),
    (_methods({"name": "vlmpruner", "pivots": "4"}), "methods[0]: vlmpruner: pivots: got '4' (str)"),
    (_methods({"name": "vlmpruner", "pivots": None}), "methods[0]: vlmpruner: pivots: got None"),
    (_methods({"name": "vlmpruner", "threshold": float("nan")}), "methods[0]: vlmpruner: threshold: got nan"),
    (_methods({"name": "vlmpruner", "threshold": float("inf")}), "methods[0]: vlmpruner: threshold: got inf"),
    (_methods({"name": "vlmpruner", "threshold_step": 0}), "methods[0]: vlmpruner: threshold_step: got 0"),
    (_methods({"name": "vlmpruner", "merge": "yes"}), "methods[0]: vlmpruner: merge: got 'yes'"),
    (_methods({"name": "vlmpruner", "layer": -1}), "methods[0]: vlmpruner: layer: got -1"),
    (_methods({"name": "fastv", "layer": 0}), "methods[0]: fastv: layer: got 0"),
    (_methods({"name": "divprune", "layer": 3}), "methods[0]: divprune: layer: got 3"),
    (_methods({"name": "fastv", "positions": "elsewhere"}), "methods[0]: fastv: positions: got 'elsewhere'"),
    (_methods({"name": "fastv", "budget": ["kept"]}), "methods[0]: fastv: budget: got ['kept']"),
    (_methods({"name": "fastv", "pruning_rate": 0.5}), "methods[0]: pruning_rate: the rates of a sweep stand in pruning_rates"),
    *[(_methods({"name": "random", "seeds": value}), "methods[0].seeds: got ") for value in (3, [], "0", {"a": 1})],
    *[(_methods({"name": "random", "seeds": [value]}), "methods[0].seeds[0]: got ") for value in ("0", 1.5, None, True, 2**31)],
    (_methods({"name": "fastv", "seeds": [0]}), "methods[0]: seeds: method fastv draws no random numbers"),
    (_methods({"name": "random", "seeds": [0, 0]}), "are the same run"),
    (_methods({"name": "random", "seeds": [0], "seed": 1}), "methods[0]: got both seed and seeds"),
    (
        _with(pruning_rates=[0.1, 0.2, 0.3], methods=[{"name": "random", "seeds": list(range(4000))}]),
        "methods: rates and seeds make 12000 runs",
    ),
    *[(_methods({"name": "fastv", "label": value}), "methods[0].label: got ") for value in ("", 3, "x" * 61, "a\nb", ["a"])],
    *[(_methods({"name": "uniform", "layer": 0, "iso_layer": value}), "iso_layer: got ") for value in (0, -1, 32, "2", 1.5)],
    (_methods({"name": "fastv", "iso_layer": 2}), "methods[0]: iso_layer: got method fastv"),
    (_methods({"name": "fastv", "scope": "per_sample"}, "dart"), "a table does not mix the two meanings of a budget"),
]
SWEEP_FILES: list[tuple[str, str]] = [*_NOT_A_FILE, *_HOSTILE, *_KEYS, *_TOP, *_RATES, *_MODELS, *_METHODS]

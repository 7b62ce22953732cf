"""No source of the package runs code that comes with data, or a shell: what a reviewer would look for, looked for by a program."""

from __future__ import annotations

import ast
from pathlib import Path

import vlm_pruner_eval

PACKAGE = Path(vlm_pruner_eval.__file__).parent
# Modules that run code when they read data, and the files that may import them: `original_weights` only for the name of an exception.
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle", "pty", "commands"}
MAY_IMPORT = {"lmms/original_format/original_weights.py": {"pickle"}}
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.execv", "os.execvp", "os.spawnl", "yaml.load", "yaml.load_all",
    "yaml.unsafe_load", "yaml.full_load", "subprocess.getoutput", "subprocess.getstatusoutput", "asyncio.create_subprocess_shell",
    "np.load", "numpy.load", "pd.read_pickle", "pandas.read_pickle", "torch.hub.load",
}  # fmt: skip
WITH_KEYWORD = {"torch.load": ("weights_only", True)}  # calls that need it
WITHOUT_KEYWORDS = {"shell": True, "trust_remote_code": True, "allow_pickle": True, "weights_only": False, "use_safetensors": False}
UNSAFE_LOADERS = {"Loader", "UnsafeLoader", "FullLoader"}


def violations(source: str, allowed: frozenset[str] | set[str] = frozenset()) -> list[str]:
    """What a source does that this package never does, each with its line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        line = getattr(node, "lineno", 0)
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"{line}: imports {module}" for module in modules if module.split(".")[0] in UNSAFE_MODULES - allowed]
        elif isinstance(node, ast.Attribute) and node.attr in UNSAFE_LOADERS and ast.unparse(node).startswith("yaml."):
            found.append(f"{line}: {ast.unparse(node)}")
        elif isinstance(node, ast.Dict):
            pairs = [(key.value, value) for key, value in zip(node.keys, node.values, strict=True) if isinstance(key, ast.Constant)]
            found += [f"{line}: {key}={ast.unparse(value)}" for key, value in pairs if _is_unsafe(key, value)]
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            found += [f"{line}: {name}"] if name in FORBIDDEN_CALLS else []
            found += [f"{line}: {key}={ast.unparse(value)}" for key, value in keywords.items() if _is_unsafe(key, value)]
            if name in WITH_KEYWORD:
                key, wanted = WITH_KEYWORD[name]
                value = keywords.get(key)
                found += [] if isinstance(value, ast.Constant) and value.value is wanted else [f"{line}: {name} without {key}={wanted}"]
    return found


def _is_unsafe(key: object, value: ast.expr) -> bool:
    """A keyword that must not have this value; `trust_remote_code` must be a literal False, so that no variable can switch it on."""
    if key == "trust_remote_code":
        return not (isinstance(value, ast.Constant) and value.value is False)
    return key in WITHOUT_KEYWORDS and isinstance(value, ast.Constant) and value.value is WITHOUT_KEYWORDS[key]


def test_no_source_runs_code_from_data() -> None:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        found[name] = violations(path.read_text(encoding="utf-8"), MAY_IMPORT.get(name, frozenset()))
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_the_pickle_module_is_only_asked_for_an_exception_where_weights_are_read() -> None:
    tree = ast.parse((PACKAGE / "lmms" / "original_format" / "original_weights.py").read_text())
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle"}
    assert used == {"UnpicklingError"}


UNSAFE = [
    "import pickle", "from pickle import loads", "import os, shelve", "def f():\n    import marshal", "import joblib.numpy_pickle",
    "eval(x)", "exec('a')", "__import__(name)", "os.system('ls')", "os.popen(x)", "yaml.load(text)", "yaml.load(text, yaml.SafeLoader)",
    "yaml.unsafe_load(x)", "f(Loader=yaml.UnsafeLoader)", "subprocess.run('ls', shell=True)", "subprocess.getoutput('ls')",
    "torch.load(p)", "torch.load(p, weights_only=False)", "torch.load(p, weights_only=flag)", "np.load(p)", "x.load(allow_pickle=True)",
    "AutoModel.from_pretrained(p, trust_remote_code=True)", "AutoModel.from_pretrained(p, trust_remote_code=flag)",
    "where = {'trust_remote_code': trust}", "M.from_pretrained(p, use_safetensors=False)", "m(weights_only=False)",
]  # fmt: skip


def test_the_scan_would_notice() -> None:
    assert [source for source in UNSAFE if not violations(source)] == []

"""The embedded benchmark: MiniVLM (a trained LLaVA of 3.8 M parameters) and DIGITSCENES (six tasks on real digits over real photos).

It checks the plumbing end to end, offline and within minutes on a CPU. It is no evidence about which method is better.
"""

from __future__ import annotations

from pathlib import Path

from vlm_pruner_eval.errors import ConfigError

TASKS = ("exist", "attribute", "where", "read", "pairs", "count")
GROUP = "digitscenes"

_CHECKPOINT = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


def _complete(folder: Path, names: tuple[str, ...], what: str) -> Path:
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ConfigError(
            f"{what}: expected {len(names)} files in {folder}, missing {', '.join(missing)}; "
            "the installation is incomplete: install vlm-pruner-eval again."
        )
    return folder


def minivlm_path() -> Path:
    """Folder of the MiniVLM checkpoint; ``pretrained=minivlm`` means it.

    Raises
    ------
    ConfigError
        Files of the checkpoint are missing from the installation.
    """
    return _complete(Path(__file__).parent / "minivlm", _CHECKPOINT, "minivlm")


def tasks_path() -> Path:
    """Folder with the lmms-eval task files of DIGITSCENES, for ``TaskManager(include_path=...)``.

    Raises
    ------
    ConfigError
        Task files or the questions are missing from the installation.
    """
    folder = Path(__file__).parent / "tasks"
    names = ("digitscenes_utils.py", f"{GROUP}.yaml", *(f"{GROUP}_{task}.yaml" for task in TASKS))
    _complete(folder, names, "digitscenes tasks")
    questions_path()
    return folder


def questions_path() -> Path:
    """The parquet file with the questions and images of DIGITSCENES's test split.

    Raises
    ------
    ConfigError
        The file is missing from the installation.
    """
    return _complete(Path(__file__).parent / "digitscenes", ("test.parquet",), "digitscenes questions") / "test.parquet"

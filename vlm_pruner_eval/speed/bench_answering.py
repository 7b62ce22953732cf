"""`bench answering`: seconds that lmms-eval takes to answer, pruned beside unpruned, with a checkpoint of real size on disk.

The checkpoint has random weights and MiniVLM's processor, so nothing is downloaded: images are decoded, preprocessed, encoded and
answered as in any evaluation, and only the answers are nonsense.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.sweep.config import SweepConfig

PROCESSOR = ("chat_template.jinja", "preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json")


def write_checkpoint(geometry: str, folder: Path, dtype: str) -> Path:
    """Write a LLaVA-1.5 of a geometry of `GEOMETRIES` with random weights, and MiniVLM's processor; kept if it is there.

    Raises
    ------
    ConfigError
        A geometry that MiniVLM's processor does not serve.
    """
    import torch

    from vlm_pruner_eval.embedded import minivlm_path
    from vlm_pruner_eval.speed.bench_setup import DTYPES
    from vlm_pruner_eval.speed.model_sizes import GEOMETRIES, build

    served = [name for name, known in GEOMETRIES.items() if (known.model_class, known.n_visual) == ("LlavaForConditionalGeneration", 576)]
    if geometry not in served:
        raise ConfigError(f"--geometry: got {geometry!r}, expected one of {', '.join(served)}: others need a processor of their own.")
    path = folder / f"{geometry}-{dtype}-random"
    if (path / "config.json").is_file():
        return path
    mini = minivlm_path()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build(GEOMETRIES[geometry], device, DTYPES[dtype])
    model.config.image_token_index = model.config.image_token_id = 4  # of MiniVLM's tokenizer
    model.save_pretrained(path)
    for name in PROCESSOR:
        shutil.copyfile(mini / name, path / name)
    return path


def bench_answering(config: SweepConfig, rounds: int = 3, *, task_manager: Any = None) -> dict[str, Any]:
    """Answer the tasks of a sweep by each of its runs in turn, with one loaded model, and compare their answering times.

    Returns
    -------
    dict
        `rounds`: seconds of answers by run, of each round; `ratios`: of each run over the unpruned one, the median of the rounds;
        `n`: questions; `failed`: runs.

    Raises
    ------
    ConfigError
        A refusal of the sweep, and fewer than one round.
    """
    if rounds < 1:
        raise ConfigError(f"--rounds: got {rounds}, expected 1 or more.")
    import torch

    from vlm_pruner_eval.speed.bench_shared import loaded_once
    from vlm_pruner_eval.speed.measuring import machine, tell
    from vlm_pruner_eval.sweep.opening import check_tasks

    models, load = loaded_once()
    manager = check_tasks(config, task_manager)
    # a few questions, so that no run pays for what happens once in a process
    _answered(config.model_copy(update={"limit": config.model.batch_size}), load, manager)
    timed = []
    failed = 0
    for number in range(rounds):
        seconds, n_failed = _answered(config, load, manager)
        timed.append(seconds)
        failed += n_failed
        tell(f"round {number + 1}: " + ", ".join(f"{run} {spent:.1f} s" for run, spent in seconds.items()))
    unpruned, *others = timed[0]
    return {
        "benchmark": "answering",
        **machine(models[0].dtype, [torch.device(models[0].device)]),
        "pretrained": Path(config.model.pretrained).name,
        "tasks": config.tasks,
        "n": (config.limit or 0) * len(config.tasks),
        "batch_size": config.model.batch_size,
        "ratios": {run: statistics.median(each[run] / each[unpruned] for each in timed) for run in others},
        "failed": failed,
        "rounds": timed,
    }


def _answered(config: SweepConfig, load: Callable[..., Any], manager: Any) -> tuple[dict[str, float], int]:
    """Seconds of answers by run, and failed runs."""
    from rich.console import Console

    from vlm_pruner_eval.store.folder import Store
    from vlm_pruner_eval.sweep.grid import expand
    from vlm_pruner_eval.sweep.runner import run_sweep
    from vlm_pruner_eval.sweep.units import units_of

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        outcome = run_sweep(config, Path(folder), console=Console(file=io.StringIO()), load=load, task_manager=manager)
        records = {unit.run.key: unit.stored(Store(Path(folder))).read() for unit in units_of(config, expand(config))}
        return {key: record.times.answers_s for key, record in records.items() if record is not None}, outcome.failed

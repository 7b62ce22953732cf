"""Known differences between our sweeps and what the authors of a paper ran: data, scoring and geometry that we don't copy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vlm_pruner_eval.report.paper.papers import DEFAULT, PAPERS, Paper

_POPE_ROWS = "LLaVA's files have 2,910 questions in POPE's split random, lmms-lab's 3,000."
_POPE_RULE = (
    "an answer counts if it reads yes or no, as in lmms-eval; LLaVA's script takes the first sentence, and for a yes whatever has no "
    "No, no or not in it. The task pope_splits_llava scores by that rule: answers other than Yes and No (heavy pruning, blind) differ much."
)
_MMBENCH = (
    "4,329 rows of lmms-lab's EN dev, scored by rules alone; LLaVA's script asks the 4,377 of mmbench_dev_20230712.tsv, and the authors "
    "had the server score them, which asks a language model about answers that rules can't read."
)
_LENGTH = "at most {} new tokens, as lmms-eval's task has it; LLaVA's script has {}. Answers of one word are the same."
OF_TASK = {
    "pope": (_POPE_RULE, _POPE_ROWS),
    "pope_splits": (_POPE_RULE, _POPE_ROWS),
    "pope_splits_llava": (_POPE_ROWS,),
    "mmbench_en_dev_llava": (_MMBENCH,),
    "gqa": (_LENGTH.format(16, 128),),
    "mme": (_LENGTH.format(16, 128),),
    "mme_total": (_LENGTH.format(16, 128),),
    "scienceqa_img": (_LENGTH.format(16, "1,024"),),
}
OF_MODEL = {
    "LLaVA-NeXT-7B": (
        "No command for this model was released. The prompts are those of the released loaders, which have branches for it; the number of "
        "tiles is read from the paper's text.",
        "The paper's 2,304 tokens are read as the base view and at most three tiles, 4 x 576, with up to 72 newline tokens on top "
        "(protocol paper); read with the newlines among them, an image has at most two tiles (protocol paper_two_tiles).",
    ),
    "Qwen2-VL-7B-Instruct": (
        "The authors submitted MMBench's test split to its server (mmbench_en_test) and took the pooled F1 of POPE, which is among the "
        "metrics of pope_splits. Their wrapper stores every image as JPEG and resizes it twice; ours does neither.",
    ),
    "LLaVA-Video-7B-Qwen2": (
        "A frame's 27 x 27 patches are pooled to 14 x 14, sides rounded up (mm_spatial_pool_mode bilinear, as the checkpoint says): 210 "
        "tokens with a newline a row. Pooled by averages they are 13 x 13, 182 tokens; a checkpoint folder whose config.json says average "
        "is run so.",
    ),
}
# asked by LLaVA's own scripts
_BY_SCRIPTS = frozenset({"LLaVA-1.5-7B", "LLaVA-1.5-13B", "LLaVA-NeXT-7B"})


def differences(vlm: str, tasks: Sequence[str], paper: Paper = PAPERS[DEFAULT]) -> Iterator[str]:
    """Sentences about a model of a paper and the tasks of a sweep; tasks differ only where the authors used LLaVA's scripts.

    Parameters
    ----------
    vlm
        The model's name in the paper's tables.
    tasks
        Names in lmms-eval.
    """
    yield from OF_MODEL.get(vlm, ()) if paper is PAPERS[DEFAULT] else (paper.tokens, *paper.notes)
    for task in tasks if vlm in _BY_SCRIPTS and not paper.by_lmms_eval else ():
        for sentence in OF_TASK.get(task, ()):
            yield f"{task}: {sentence}"

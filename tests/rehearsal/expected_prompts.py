"""The prompts of the first question of every task, to the byte, before a processor spells its images out."""

from __future__ import annotations

from standin_videos import MVBENCH

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers "
    "to the user's questions. USER: <image>\n{} ASSISTANT:"
)
QWEN = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{}<|im_end|>\n<|im_start|>assistant\n"
ONEVISION = "<|im_start|>user\n<image>{}<|im_end|>\n<|im_start|>assistant\n"
VIDEO = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<video>\n{}<|im_end|>\n<|im_start|>assistant\n"
WORD = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."

SCIENCEQA = "Context: The passage describes a map.\nRead it.\nWhat is the name of the colony?\nA. Maryland\nB. New Hampshire" + LETTER
SEED = "How many towels are in the image?\nA. One\nB. Two\nC. Three\nD. Four" + LETTER
OPTIONS = "\nA. the cup\nB. the dog\nC. the tree\nD. the road"
OF_LLAVAS_SCRIPTS = {
    "gqa": "What is on the table?" + WORD,
    "mmbench_en_dev_llava": "Read the passage.\nThen answer.\nWhat is in the middle?" + OPTIONS + LETTER,
    "mme_total": "Is there a cup in this image?" + WORD,
    "pope_splits": "Is there a snowboard in the image?" + WORD,
    "scienceqa_img": SCIENCEQA,
    "textvqa_val_ocr": "What is the brand of this camera?\nReference OCR token: DAKOTA, o$1.99, RE.SAVEMORE," + WORD,
    "ocrbench_short": "what is written in the image?" + WORD,
    "seedbench_image": SEED,
    "ok_vqa_val2014_plain": "What sport can you use this for?" + WORD,
}
_ALIKE = ("gqa", "mme_total", "pope_splits", "scienceqa_img", "textvqa_val_ocr", "seedbench_image")
OF_THEIR_LMMS_EVAL = {
    **{task: OF_LLAVAS_SCRIPTS[task] for task in _ALIKE},
    "mmbench_en_dev_static": (
        "Read the passage.\nThen answer. What is in the middle? There are several options:" + OPTIONS + "\n" + LETTER
    ),
    "ocrbench": "what is written in the image?",
    "ok_vqa_val2014": (
        "What sport can you use this for?\nWhen the provided information is insufficient, respond with 'Unanswerable'." + WORD
    ),
}
OF_VIDEOS = {
    "mlvu_dev": "What is it?\n(A) cup\n(B) dog\n(C) tree\n(D) road\nOnly give the best option.\nBest option: (",
    "videomme": (
        "Select the best answer to the following multiple-choice question based on the video and the subtitles. Respond with only the "
        "letter (A, B, C, or D) of the correct option.\nHow many cups are there?\nA. Apples.\nB. Candles.\nC. Berries.\nD. All alike.\n"
        "The best answer is:"
    ),
    "longvideobench_val_v": "Which subtitles appear?\nA. promise\nB. run\nC. sit" + LETTER + "\n",
}
OF_MVBENCH = "Question:What happened?\nOption:\n(A) The cup.\n(B) The dog.\nOnly give the best option.\n"
OF_THE_SUITE = {
    "chartqa": "How many bars are red?\nAnswer the question with a single word.",
    "docvqa_val": "What is the value in 1975?" + WORD,
    "infovqa_val": "Which has the most users?" + WORD,
    "mmstar": "Which one is it?\nOptions: A: cup, B: dog, C: tree, D: road" + LETTER.removesuffix("."),
    "refcoco_bbox_rec_testA": (
        "Bounding box coordinates are specified in the format (top-left x, top-left y, bottom-right x, bottom-right y). All values are "
        "floating point numbers bounded between 0 and 1. Please provide the bounding box coordinate of the region this sentence "
        "describes: left person"
    ),
    "ai2d": "which of these define dairy item\nA. c\nB. D\nC. b\nD. a" + LETTER,
}


def filled(template: str, questions: dict[str, str]) -> dict[str, dict[str, str]]:
    """By entry of the sweep file, the prompts of its tasks by name; of all but mvbench a single one."""
    return {task: {task: template.format(question)} for task, question in questions.items()}


_NEXT = OF_LLAVAS_SCRIPTS | {"textvqa_val": "What is the brand of this camera?" + WORD}
EXPECTED = {
    "paper/table1_llava15_7b.yaml": filled(VICUNA, OF_LLAVAS_SCRIPTS),
    "paper/table2_llava_next_7b.yaml": filled(VICUNA, {task: text for task, text in _NEXT.items() if task != "textvqa_val_ocr"}),
    "paper/table3_qwen2_vl_7b.yaml": filled(QWEN, OF_THEIR_LMMS_EVAL),
    "paper/table4_llava_video_7b.yaml": filled(VIDEO, OF_VIDEOS)
    | {"mvbench": {f"mvbench_{task}": VIDEO.format(OF_MVBENCH) for task in MVBENCH}},
    "paper/table7_qwen3_vl_4b.yaml": filled(
        QWEN, {task: (OF_LLAVAS_SCRIPTS | OF_THEIR_LMMS_EVAL)[task] for task in ("mme_total", "scienceqa_img", "ocrbench")}
    ),
    "suite_2026.yaml": filled(ONEVISION, OF_THE_SUITE),
}
# the prompts that these are, and what else the authors may have used
ORIGIN = {
    "paper/table1_llava15_7b.yaml": "LLaVA's script",
    "paper/table2_llava_next_7b.yaml": "the released loader's branch for 1.6",
    "paper/table3_qwen2_vl_7b.yaml": "the authors' copy of lmms-eval",
    "paper/table4_llava_video_7b.yaml": "lmms-eval's, no script released",
    "paper/table7_qwen3_vl_4b.yaml": "lmms-eval's, no script released",
    "suite_2026.yaml": "lmms-eval's",
}

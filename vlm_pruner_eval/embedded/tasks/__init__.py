"""lmms-eval task files of DIGITSCENES, and the functions they name."""

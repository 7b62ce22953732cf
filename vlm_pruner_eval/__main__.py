"""`python -m vlm_pruner_eval` is the same command as `vlm-pruner-eval`."""

from vlm_pruner_eval.cli import main

if __name__ == "__main__":
    main()

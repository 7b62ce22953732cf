"""DIGITSCENES: the generator of the embedded benchmark and its test split (test.parquet). See README.md in this folder.

Generating needs scikit-learn, scikit-image and SciPy (the `test` extra); reading the shipped questions needs none of them.
"""

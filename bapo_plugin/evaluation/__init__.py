"""`bapo eval`: a model before training against the same model with one or more adapters.

run.py       what is measured, in order; former answers
subject.py   the model, loaded once; its adapter switched off is what it was before
harness.py   tasks of lm-eval, before and after, with paired errors
output.py    the table, `bapo-eval.json` and `bapo-eval.md`
tasks/       tasks of ours that lm-eval has not
"""

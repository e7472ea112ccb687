"""`bapo eval`: a model before training against the same model with one or more adapters.

run.py       what is measured, in order; former answers
pairs.py     held-out pairs: accuracy and margin
recorded.py  pairs and former answers as they are written, row by row; repetition
subject.py   the model, loaded once; its adapter switched off is what it was before
scaled.py    adapters at a part of their strength
harness.py   tasks of lm-eval, run before and after
local.py     their questions from files, in place of the hub
task_results.py  their results before and after, with paired errors, by task, group and subject
output.py    the table, `bapo-eval.json` and `bapo-eval.md`
tasks/       tasks of ours that lm-eval has not
local_tasks/ tasks whose questions come from files
"""

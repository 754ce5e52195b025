"""Tuning: the fastest right knobs for the kernels of a step, found by MetaSchedule and kept as records.

task.py      a kernel call of a step with valid arguments: index arrays at the layer's real sparsity, and the answer
             wanted
space.py     a schedule's knobs as a MetaSchedule design space; records to its tuning records and back
search.py    MetaSchedule's evolutionary search, XGBoost cost model, task scheduler and database around a runner
runner.py    what a runner is; runners/ has one file each: "local", "rpc", ... A file there that registers a Runner adds
             one
layout.py    what is settled before: vector width and sections of the index, timed in whole steps
session.py   a whole tuning session: tasks, search, confirmation of the winners; goes on where it was stopped
"""

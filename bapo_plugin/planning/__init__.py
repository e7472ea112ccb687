"""`bapo plan`: does a run fit, how large may it be, how long does it take; computed without weights and without a GPU.

settings (YAML to numbers) -> architecture (config to parameters, on the meta device) -> memory (bytes of what stays) and
rehearsal (bytes of a step) -> estimate -> search (what else would fit) and speed (seconds).
"""

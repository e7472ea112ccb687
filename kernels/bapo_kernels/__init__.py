"""Log-probabilities of sequences from hidden states, without the [tokens x vocabulary] logits.

Two public functions, :func:`sequence_logprobs` and :func:`sequence_kl`, and the tuples they return.
The package imports torch only; Triton is imported by the paths that run on it, when they run.
"""

from bapo_kernels.api import sequence_kl, sequence_logprobs
from bapo_kernels.reference import SequenceKL, SequenceLogps

__all__ = ["SequenceKL", "SequenceLogps", "sequence_kl", "sequence_logprobs"]
__version__ = "0.1.0"

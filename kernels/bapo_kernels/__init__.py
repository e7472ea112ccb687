"""Log-probabilities of sequences from hidden states, without the [tokens x vocabulary] logits.

One public function, :func:`sequence_logprobs`, and the tuple it returns. The package imports
torch only; Triton is imported by the paths that run on it, when they run.
"""

from bapo_kernels.api import sequence_logprobs
from bapo_kernels.reference import SequenceLogps

__all__ = ["SequenceLogps", "sequence_logprobs"]
__version__ = "0.1.0"

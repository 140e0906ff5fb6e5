"""BESA: blockwise, differentiable sparsity allocation for pruning large language models (arXiv 2402.16880)."""

__version__ = "0.1.0"

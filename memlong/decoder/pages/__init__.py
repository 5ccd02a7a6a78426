"""Page choice: each token attends to a few pages of the retrieved tokens, each K-V head to its own.

A token first compares its queries with a sketch of the retrieved keys, the channels in which they are largest (as SparQ
attention, arXiv 2312.04985, does for queries), and then attends to the pages that promise most attention (as Quest,
arXiv 2406.10774, does by bounds). Local window and chosen pages share one softmax.
"""

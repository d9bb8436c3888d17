"""The shortlist: a softmax over the labels of some positions and a sampled tail.

`shortlist` is the estimated loss, `sampler` draws the tokens, and `tail_proposal` says with which
probability.
"""

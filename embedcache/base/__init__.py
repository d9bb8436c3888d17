"""The base: a frozen causal language model, where it comes from and what it is.

``locate`` turns what a user types (a builtin, a GGUF file, a directory, a hub id) into a local
directory; ``identity`` says from that directory's files which base it is; ``load`` reads it into
a frozen model, checked once against its own logits; ``head`` is the linear map from the final
embedding to the logits; ``taps`` are the places where embeddings are taken. Importing this
package, or ``identity``, ``locate`` and ``home``, imports neither torch nor transformers.
"""

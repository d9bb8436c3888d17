"""The base: a frozen causal language model.

- ``locate``: the local directory of a builtin, a GGUF file, a directory or a hub id.
- ``gguf``: a GGUF file converted to a directory in transformers' layout.
- ``identity``: the fingerprint of a base, from its files.
- ``pretrained``: configuration, tokenizer and model, read with transformers.
- ``load``: a frozen model, checked against its own logits.
- ``head``: the linear map from the final embedding to the logits.
- ``taps``: the places where embeddings are taken.
- ``forward``: the embeddings of a block of sequences.
- ``gather``: rows of a matrix that may lie in host memory.
- ``home``: the directory for converted bases and weight hashes.

``home``, ``identity``, ``locate``, ``gguf`` and ``pretrained`` import neither torch nor
transformers until a function needs them.
"""

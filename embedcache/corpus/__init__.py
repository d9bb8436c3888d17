"""From documents to token sequences: what a cache is a cache of.

``sources`` reads text files, folders, records and data sets as ``documents``; ``render`` turns a
document into tokens, marks which are targets and says which bytes each one spells; ``sequences``
cuts them to the context and assigns each document to train, dev or test, near-duplicates kept
together. Everything streams: memory does not grow with the corpus. Neither torch nor transformers
is imported here; a tokenizer is handed in.
"""

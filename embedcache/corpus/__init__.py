"""From documents to token sequences.

- ``config``: the settings of a corpus.
- ``sources``: documents from text files, folders, record files and data sets.
- ``render``: records and chats as text, and text as token ids with targets and byte spans.
- ``sequences``: a document's tokens cut to the context.
- ``dedup``: fingerprints of documents, and groups of near-duplicates.
- ``splits``: train, dev or test for each document.
- ``reader``: the whole pass, from sources to sequences.

Documents are streamed, so memory does not grow with the corpus. Neither torch nor transformers is
imported here; the caller provides the tokenizer.
"""

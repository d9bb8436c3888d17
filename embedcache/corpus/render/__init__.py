"""Records and chats rendered as text, and text as token ids with a loss mask."""

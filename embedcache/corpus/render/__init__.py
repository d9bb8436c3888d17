"""Records and chats rendered as text, and text tokenised with targets and byte spans."""

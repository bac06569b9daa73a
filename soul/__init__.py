"""Who it is: SOUL.md, principles and checks, conversations, the tool interface and the token template. Knows no other room."""

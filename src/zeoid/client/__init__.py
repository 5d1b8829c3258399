"""The client storage: the ZODB face, the view of the database it shows, and the connection beneath."""

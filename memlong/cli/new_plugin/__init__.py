"""``memlong plugins new``: the names a plugin gets, the files it is made of, and the command that writes them."""

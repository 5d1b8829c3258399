"""Who a peer is, what it may do, and how nobody else can read or change what it says."""

"""Floor 5: experiments that compose the rooms: compare, demo, and the report."""

"""The leaderboard of a context family: what its rows are, how they are entered, and what is checked about them."""

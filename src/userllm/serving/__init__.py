"""Users computed ahead: what an answer needs of them is kept, and grows with their histories."""

"""The live page of erase-live: what it draws, and the page around it."""

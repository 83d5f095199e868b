"""Write files so that they survive a crash, and verify on reading that they are what was written."""

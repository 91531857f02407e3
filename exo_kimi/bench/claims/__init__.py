"""The claims, one file each: what is measured, against whom, and the bar."""

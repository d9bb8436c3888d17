"""Stage two: training carry-ons from a cache, one by one or stacked in a sweep."""

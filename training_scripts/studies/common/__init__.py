"""What the studies share: pieces of work on disk, trainers, intervals, pages and plots."""

"""What an administrator does to whole databases, without regard to who asked for it: copying, comparing."""

"""Lists of independent jobs: shared by equal processes on a folder, or handed out by Ray."""

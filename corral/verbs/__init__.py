"""What the command line does, a module or a folder for each verb."""

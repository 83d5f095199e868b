"""What turns the directories of a plan's runs into an answer."""

"""Files that ``convert --tier code`` copies beside the weights, where they run without this toolkit."""

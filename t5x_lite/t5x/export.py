"""Says that SavedModels are exported by Google's T5X alone."""

import sys

if __name__ == '__main__':
  sys.exit("error: t5x.export is of Google's T5X alone: make setup ENGINE=t5x")

"""What only a GPU can show. Not yet run on a GPU: no run of these tests has been seen to pass."""

"""Where on a picture something is: boxes and points, asked in a model's own coordinates, told in the picture's."""

"""What several methods of image classification share."""

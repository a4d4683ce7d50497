"""Publishing: the push to the Hub, exports to other formats, and the report in a tracker."""

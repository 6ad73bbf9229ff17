"""The methods of the toy domain; `ghost` is registered and has no module."""

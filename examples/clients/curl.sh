#!/bin/sh
# curl: a picture, by all three protocols.
# sh examples/clients/curl.sh IMAGE [BASE_URL]
set -eu
url=${2:-http://127.0.0.1:8000}
picture=$(base64 <"$1" | tr -d '\n')
text="What is in the picture?"

ask() { # PATH BODY
    printf '%s' "$2" | curl --silent --show-error --fail-with-body "$url$1" \
        -H "Content-Type: application/json" -d @-
    echo
}

ask /v1/chat/completions '{"model": "demo", "messages": [{"role": "user", "content": [
    {"type": "image_url", "image_url": {"url": "data:image/png;base64,'"$picture"'"}},
    {"type": "text", "text": "'"$text"'"}]}]}'

ask /v1/responses '{"model": "demo", "input": [{"role": "user", "content": [
    {"type": "input_image", "image_url": "data:image/png;base64,'"$picture"'"},
    {"type": "input_text", "text": "'"$text"'"}]}]}'

ask /v1/messages '{"model": "demo", "max_tokens": 64, "messages": [{"role": "user", "content": [
    {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "'"$picture"'"}},
    {"type": "text", "text": "'"$text"'"}]}]}'

// Server-sent events out of the pieces of a response.

/** Reader of `data:` lines. Pieces may be cut anywhere, also inside a character or a line end. */
export class EventReader {
  #decoder = new TextDecoder();
  #rest = "";
  #data = [];

  /** Return the data of the events that `piece` (a Uint8Array) completes. */
  feed(piece) {
    return this.#lines(this.#decoder.decode(piece, { stream: true }));
  }

  /** Return the data of an event that the end of the response completes. */
  end() {
    const found = this.#lines(this.#decoder.decode() + "\n\n");
    return found;
  }

  #lines(text) {
    const events = [];
    const lines = (this.#rest + text).split(/\r\n|\n|\r(?!$)/);
    this.#rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data:")) this.#data.push(line.slice(line[5] === " " ? 6 : 5));
      else if (line === "" && this.#data.length) {
        events.push(this.#data.join("\n"));
        this.#data = [];
      }
    }
    return events;
  }
}

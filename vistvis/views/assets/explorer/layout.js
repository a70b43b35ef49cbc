// Which token lies where: vistvis.TokenLayout, and how a scene's tokens are found at a site.

export class Layout {
  constructor({ frames, grid, special, patch_size, behind = [], before = [], after = [] }) {
    Object.assign(this, { frames, grid, special, behind, before, after, patchSize: patch_size });
    this.patches = grid[0] * grid[1];
    this.perFrame = special.length + this.patches + behind.length;
    this.count = before.length + frames * this.perFrame + after.length;
  }

  start(frame) {
    return this.before.length + frame * this.perFrame;
  }

  /** `{token, frame, kind, nth, inFrame, patch, row, col}`; frame is null for a token of none. */
  locate(token) {
    const inAll = token - this.before.length;
    const frame = Math.floor(inAll / this.perFrame);
    if (inAll < 0 || frame >= this.frames) {
      const early = inAll < 0;
      const nth = early ? token : token - this.start(this.frames);
      const kinds = early ? this.before : this.after;
      return { token, frame: null, inFrame: nth, kind: kinds[nth], patch: null };
    }
    const inFrame = inAll - frame * this.perFrame;
    const patch = inFrame - this.special.length;
    if (patch >= 0 && patch < this.patches) {
      const row = Math.floor(patch / this.grid[1]);
      const col = patch - row * this.grid[1];
      return { token, frame, inFrame, kind: "patch", patch, row, col };
    }
    const kind = patch < 0 ? this.special[inFrame] : this.behind[patch - this.patches];
    return { token, frame, inFrame, kind, patch: null };
  }

  patchToken(frame, row, col) {
    return this.start(frame) + this.special.length + row * this.grid[1] + col;
  }

  /** The special tokens of a frame, or for null those of no frame, as `locate` gives them. */
  specials(frame) {
    const tokens = [];
    const add = (from, count) => {
      for (let i = 0; i < count; i++) tokens.push(this.locate(from + i));
    };
    if (frame === null) {
      add(0, this.before.length);
      add(this.start(this.frames), this.after.length);
    } else {
      add(this.start(frame), this.special.length);
      add(this.start(frame) + this.special.length + this.patches, this.behind.length);
    }
    return tokens;
  }

  equals(other) {
    return JSON.stringify(this) === JSON.stringify(other);
  }
}

// Points and the eye that looks at them: orbit, projection, picking. Draws nothing.
// Axes are right, down, forward, of cameras and of the eye alike (OpenCV's).

const FIELD = Math.tan((25 * Math.PI) / 180); // half the field of view, along the shorter side

function turned(m, [x, y, z]) {
  return [0, 3, 6].map((i) => m[i] * x + m[i + 1] * y + m[i + 2] * z);
}

function turnedBack(m, [x, y, z]) {
  return [0, 1, 2].map((i) => m[i] * x + m[i + 3] * y + m[i + 6] * z);
}

function product3(a, b) {
  const out = new Array(9).fill(0);
  for (let i = 0; i < 9; i++) {
    for (let k = 0; k < 3; k++) out[i] += a[3 * Math.floor(i / 3) + k] * b[3 * k + (i % 3)];
  }
  return out;
}

/** The number below which a share of the sorted ones lie. */
export function quantile(sorted, share) {
  return sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
}

/** What a manifest's `points` hold: positions, sizes, confidence, and cameras with their fields. */
export class Cloud {
  constructor(points, layout, decode) {
    const floats = (text) => new Float32Array(decode(text).buffer);
    this.layout = layout;
    this.positions = floats(points.positions);
    this.count = this.positions.length / 3;
    this.confidence = points.confidence ? floats(points.confidence) : null;
    this.finite = Array.from({ length: this.count }, (_, n) => n).filter((n) =>
      this.at(n).every(Number.isFinite),
    );
    this.sizes = this.neighbours();
    const numbers = points.cameras ? floats(points.cameras) : [];
    this.cameras = [];
    for (let n = 0; n + 11 < numbers.length; n += 12) {
      const turn = [0, 1, 2, 4, 5, 6, 8, 9, 10].map((i) => numbers[n + i]);
      const shift = [3, 7, 11].map((i) => numbers[n + i]);
      const place = turnedBack(turn, shift).map((value) => -value);
      this.cameras.push({ turn, place, ...this.field(n / 12, turn, shift) });
    }
  }

  at(n) {
    return [0, 1, 2].map((i) => this.positions[3 * n + i]);
  }

  /** The scene's token of a point, and back; null for a token that is no patch. */
  token(n) {
    const [rows, cols] = this.layout.grid;
    const patch = n % (rows * cols);
    const frame = (n - patch) / (rows * cols);
    return this.layout.patchToken(frame, Math.floor(patch / cols), patch % cols);
  }

  point(token) {
    const place = this.layout.locate(token);
    return place.patch === null ? null : place.frame * this.layout.patches + place.patch;
  }

  /** How far each point lies from the nearest of the patches right of it and below it. */
  neighbours() {
    const [rows, cols] = this.layout.grid;
    const sizes = new Float32Array(this.count);
    for (let n = 0; n < this.count; n++) {
      const col = n % cols;
      const row = Math.floor(n / cols) % rows;
      const others = [[col + 1 < cols ? 1 : -1, cols > 1], [row + 1 < rows ? cols : -cols, rows > 1]];
      const apart = others
        .filter(([, there]) => there)
        .map(([step]) => Math.hypot(...[0, 1, 2].map((i) => this.at(n)[i] - this.at(n + step)[i])));
      sizes[n] = Math.min(...apart.filter(Number.isFinite));
    }
    const known = sizes.filter(Number.isFinite).sort();
    const middle = known.length ? quantile(known, 0.5) : 0.01;
    return sizes.map((size) => (Number.isFinite(size) ? Math.min(size, 4 * middle) : middle));
  }

  /** The tangents of half a camera's field, from where its outermost patches lie. */
  field(frame, turn, shift) {
    const [rows, cols] = this.layout.grid;
    const tangents = [[], []];
    for (let row = 0; row < rows; row++) {
      for (let col = 0; col < cols; col++) {
        const seen = turned(turn, this.at(frame * rows * cols + row * cols + col));
        const [x, y, z] = seen.map((value, i) => value + shift[i]);
        if (!(z > 0)) continue;
        if (cols > 1 && col % (cols - 1) === 0) tangents[0].push((Math.abs(x / z) * cols) / (cols - 1));
        if (rows > 1 && row % (rows - 1) === 0) tangents[1].push((Math.abs(y / z) * rows) / (rows - 1));
      }
    }
    const [across, down] = tangents.map((values) => {
      const sorted = values.filter(Number.isFinite).sort((a, b) => a - b);
      return sorted.length ? Math.min(Math.max(quantile(sorted, 0.5), 0.1), 2) : 0.5;
    });
    return { across, down };
  }

  /** The lines of a camera's frustum, pairs of points. */
  frustum({ turn, place, across, down }, length) {
    const corners = [[-1, -1], [1, -1], [1, 1], [-1, 1]].map(([x, y]) => {
      const out = turnedBack(turn, [x * across * length, y * down * length, length]);
      return out.map((value, i) => value + place[i]);
    });
    const around = corners.map((corner, n) => [corner, corners[(n + 1) % 4]]);
    return [...around, ...corners.map((corner) => [place, corner])].flat(2);
  }
}

/** Where the eye is. `turn` is a matrix by rows, `turn · (point − eye)` is what it sees. */
export class Eye {
  constructor(cloud) {
    this.cloud = cloud;
    const middle = cloud.cameras[Math.floor(cloud.cameras.length / 2)];
    this.base = middle ? middle.turn : [1, 0, 0, 0, 1, 0, 0, 0, 1];
    this.width = this.height = 0; // until it is known
    this.reset();
  }

  /** All of the cloud but its outermost twentieths, and the cameras, from behind and above these. */
  reset() {
    const seen = this.cloud.finite.map((n) => turned(this.base, this.cloud.at(n)));
    const places = this.cloud.cameras.map(({ place }) => turned(this.base, place));
    const box = [0, 1, 2].map((axis) => {
      const sorted = Float32Array.from(seen, (point) => point[axis]).sort();
      const also = places.map((place) => place[axis]);
      return [
        Math.min(quantile(sorted, 0.05), ...also),
        Math.max(quantile(sorted, 0.95), ...also),
      ];
    });
    this.target = turnedBack(this.base, box.map(([low, high]) => (low + high) / 2));
    this.radius = Math.hypot(...box.map(([low, high]) => high - low)) / 2 || 1;
    this.distance = this.radius / FIELD;
    this.yaw = -0.45;
    this.pitch = 0.3;
    this.place();
    if (!this.width) return;
    const within = (point) => point.every((value, i) => value >= box[i][0] && value <= box[i][1]);
    this.distance = 1.08 * this.enough([...seen.filter(within), ...places]);
    this.place();
  }

  /** How far from the target the eye sees all of these places, which are along the base's axes. */
  enough(places) {
    const shorter = Math.min(this.width, this.height);
    const [across, down] = [this.width, this.height].map((side) => (FIELD * side) / shorter);
    let distance = 0;
    for (const place of places) {
      const apart = turnedBack(this.base, place).map((value, i) => value - this.target[i]);
      const [x, y, z] = turned(this.turn, apart);
      distance = Math.max(distance, Math.abs(x) / across - z, Math.abs(y) / down - z);
    }
    return distance || this.distance;
  }

  place() {
    const [cy, sy] = [Math.cos(this.yaw), Math.sin(this.yaw)];
    const [cp, sp] = [Math.cos(this.pitch), Math.sin(this.pitch)];
    const round = product3([1, 0, 0, 0, cp, -sp, 0, sp, cp], [cy, 0, -sy, 0, 1, 0, sy, 0, cy]);
    this.turn = product3(round, this.base);
    const back = turnedBack(this.turn, [0, 0, this.distance]);
    this.eye = this.target.map((value, i) => value - back[i]);
    this.focal = Math.min(this.width, this.height) / (2 * FIELD); // in pixels
  }

  size(width, height) {
    const first = !this.width;
    [this.width, this.height] = [width, height];
    if (first) this.reset();
    else this.place();
  }

  orbit(right, down) {
    this.yaw += right;
    this.pitch = Math.min(Math.max(this.pitch + down, -1.55), 1.55);
    this.place();
  }

  zoom(factor) {
    const least = this.radius * 0.02;
    this.distance = Math.min(Math.max(this.distance * factor, least), this.radius * 50);
    this.place();
  }

  /** Moves what is seen by so many pixels. */
  pan(x, y) {
    const step = this.distance / this.focal;
    const move = turnedBack(this.turn, [-x * step, -y * step, 0]);
    this.target = this.target.map((value, i) => value + move[i]);
    this.place();
  }

  /** `[x, y, depth]`: pixels from the upper left; depth ≤ 0 lies behind. */
  project(point) {
    const [x, y, z] = turned(this.turn, point.map((value, i) => value - this.eye[i]));
    return [this.width / 2 + (this.focal * x) / z, this.height / 2 + (this.focal * y) / z, z];
  }

  /** How many pixels across a point is drawn. */
  pixels(n, depth) {
    return Math.min(Math.max((1.1 * this.cloud.sizes[n] * this.focal) / depth, 2), 40);
  }

  /** Of the points `among` the one under a pixel: the nearest to it of those in front; or null. */
  pick(x, y, among) {
    const near = [];
    let front = Infinity;
    for (const n of among) {
      const [px, py, depth] = this.project(this.cloud.at(n));
      if (!(depth > 0)) continue;
      const apart = Math.hypot(px - x, py - y);
      if (apart > Math.max(6, this.pixels(n, depth) / 2)) continue;
      near.push([apart, depth, n]);
      front = Math.min(front, depth + 2 * this.cloud.sizes[n]);
    }
    const seen = near.filter(([, depth]) => depth <= front).sort((a, b) => a[0] - b[0]);
    return seen.length ? seen[0][2] : null;
  }
}
